"""Export a config's model to OpenVINO."""

from deployment import parser, run

from vrwkv.export import to_openvino

if __name__ == '__main__':
    run(to_openvino, parser(__doc__, '.xml').parse_args())
