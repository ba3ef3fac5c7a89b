"""Libraries of models whose own switches turn tvcompile's ops on. None is imported before it is asked for."""
