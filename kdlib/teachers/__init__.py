"""The teachers' room: what they said of every utterance, kept on disk once."""
