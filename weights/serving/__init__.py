"""What serving requests takes, whatever the model: settings, the engine thread, cancels, outputs, errors."""
