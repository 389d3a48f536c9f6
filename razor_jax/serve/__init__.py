"""Generation by many processes at once: `batch` from a file of prompts, `interactive` from a terminal.

Before loading weights, the processes check that they have the same model and options (`agreement`). From then on
process 0 decides every step and broadcasts it (`messages`), so all reach the same collectives in the same order.
"""
