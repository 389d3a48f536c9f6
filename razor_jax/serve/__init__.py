"""Generation by many processes at once: `batch` from a file of prompts, `interactive` from a terminal.

Every process reaches the same collectives in the same order, for each does what process 0 says (`messages`), after all
have found that they hold the same model and options (`agreement`).
"""
