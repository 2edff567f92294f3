"""Language models in use: folders, generation, states of long texts, export, conversion."""
