"""The options of every command, one frozen dataclass each: what the command line, a YAML file and a Python call share.

Nothing here imports torch: the command line reads its options from these modules.
"""
