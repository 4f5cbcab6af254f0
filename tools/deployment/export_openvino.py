"""Export a config's model to OpenVINO."""

from deployment import parser, run

from vrwkv.export import to_openvino


def main(argv: list[str] | None = None) -> None:
    """Export from the command line."""
    run(to_openvino, parser(__doc__, '.xml').parse_args(argv))


if __name__ == '__main__':
    main()
