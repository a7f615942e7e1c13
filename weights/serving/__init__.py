"""What serving takes, whatever the model: settings, the engine thread, cancels, outputs."""
