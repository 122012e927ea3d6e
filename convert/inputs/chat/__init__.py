"""What a chat becomes: the tokenizer with its chat templates, and how they begin and end an answer."""
