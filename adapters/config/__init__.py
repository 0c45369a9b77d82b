"""Every key of the configuration, documented once; TOML and --set."""
