"""Compile a config's model with AOTInductor into a package that runs without Python."""

from deployment import parser, run

from vrwkv.export import to_aoti
from vrwkv_ops.decomposition import FORMS


def main(argv: list[str] | None = None) -> None:
    """Export from the command line."""
    run(to_aoti, parser(__doc__, '.pt2', ('operators', *FORMS)).parse_args(argv))


if __name__ == '__main__':
    main()
