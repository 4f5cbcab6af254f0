"""Export a config's model to a program of PyTorch's operators, for torch.export.load."""

from deployment import parser, run

from vrwkv.export import export_program


def main(argv: list[str] | None = None) -> None:
    """Export from the command line."""
    run(export_program, parser(__doc__, '.pt2').parse_args(argv))


if __name__ == '__main__':
    main()
