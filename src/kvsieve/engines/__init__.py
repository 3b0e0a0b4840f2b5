"""Engine adapters: thin layers between an inference engine and a session."""
