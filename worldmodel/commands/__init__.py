"""The command `worldmodel`: one module per sub-command, the only place that knows models, planners and robots alike.

A sub-command's module has a frozen dataclass `Config`, whose fields are its flags and the keys of its presets, a function
`run(Config) -> dict` whose result JSON can hold, and `report(dict) -> str`, the same for people.
"""
