"""Text in, text out: prompts, the token loop, sampling, chat and scores."""
