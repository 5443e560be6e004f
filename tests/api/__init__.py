"""HTTP: who may call, what bodies may say, and the original API to the letter."""
