"""What each command does, once its arguments are parsed; heavy imports come in with the modules."""
