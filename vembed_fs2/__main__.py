import sys

from vembed_fs2.cli import VEMBED

sys.exit(VEMBED.main(sys.argv[1:], "python -m vembed_fs2"))
