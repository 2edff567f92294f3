"""Using language models: model folders, generation, chat, saved states, export and conversion."""
