"""Kernels with a bug, and their legal twins."""


def twins(seeded, arguments, begin=""):
    """The source of the kernels "name_wrong" and "name_legal" for each body of {kind: {name: body}}.

    Where the two differ, a body has "@", the wrong one's text, "@", the legal one's, and "@".
    """
    kernels = []
    for name, body in ((name, body) for bodies in seeded.values() for name, body in bodies.items()):
        parts = body.split("@")
        for form, of_the_other in (("wrong", 2), ("legal", 1)):
            text = "".join(part for index, part in enumerate(parts) if index % 3 != of_the_other)
            kernels.append(f"kernel void {name}_{form}({arguments}) {{ {begin} {text} }}\n")
    return "".join(kernels)
