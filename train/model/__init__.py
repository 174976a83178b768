"""All that touches the insides of Ultralytics' models, losses and checkpoints."""
