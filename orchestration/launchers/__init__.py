"""Where a stage's command runs: one module an engine, all with the interface of `assets_defs.launching.Launcher`."""
