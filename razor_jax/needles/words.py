"""The words that planted facts are named with; every name is one token of razor-mini's tokenizer."""

# ruff: noqa: SIM905 (a word list reads better as words)

ADJECTIVES = tuple(
    """
    amber ancient autumn blue brave bright broken calm clever copper crimson crystal dark distant dusty
    eager early emerald fading frozen gentle golden grand green hidden hollow humble iron ivory jolly late
    little lively lonely lunar marble mellow misty modern narrow noble northern orange pale patient polished
    proud purple quiet rapid red royal rusty sandy scarlet secret shiny silent silver sleepy small smooth
    solar southern spare stone stormy summer sunny swift tall tiny violet warm western white wild winter
    yellow
    """.split()
)
NOUNS = tuple(
    """
    anchor apple arrow badger barn basket beacon bell bison boat bottle bridge candle canyon castle cedar
    cherry cliff cloud comet compass cottage crane dolphin dragon eagle engine falcon feather fern field
    forest fox garden glacier hammer harbor hawk heron hill island kettle kite ladder lake lantern lemon
    library lion maple meadow mill mirror moon mountain nest oak ocean orchard otter owl panther pepper
    piano pine planet pond rabbit raven river rocket rose sailor salmon shadow shell sparrow spider star
    tiger tower train turtle valley violin walnut whale willow window wolf
    """.split()
)
KINDS = (
    "access code",
    "badge number",
    "serial number",
    "locker number",
    "ticket number",
    "invoice number",
    "vault code",
    "door code",
)
