"""The log on disk: what it accepts, what it refuses, and what it finds out about itself."""
