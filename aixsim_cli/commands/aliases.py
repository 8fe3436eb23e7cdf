"""The names that NewComputeBench gives to our commands, accepted and not shown."""

_NAMES = {
    ("eval", "pt-ppl"): ["eval", "ppl"],
    ("eval", "hf-ppl"): ["eval", "ppl"],
    ("eval", "hf-lm-eval"): ["eval", "lm-eval"],
    ("eval", "hf-gen"): ["generate-hf"],
    ("convert-ckpt", "pt2hf"): ["convert-ckpt"],
    ("convert-ckpt", "hf2pt"): ["convert-ckpt"],
}


def translate(argv: list[str]) -> list[str]:
    """A command line in our own names.

    Args:
        argv: after the program's name.
    """
    name, rest = (argv[0], argv[1]) if len(argv) > 1 else ("", ""), argv[2:]
    if name not in _NAMES:
        return argv
    if name == ("eval", "pt-ppl") and len(rest) > 2 and not any(w[:1] == "-" for w in rest[:3]):
        # architecture and flavor come before the folder there; here the folder tells them
        rest = rest[2:]
    return _NAMES[name] + rest
