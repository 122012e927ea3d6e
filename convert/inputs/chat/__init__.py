"""What a chat becomes: the tokenizer, its chat templates, and how they begin and end an answer."""
