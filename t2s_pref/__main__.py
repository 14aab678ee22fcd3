"""`python -m t2s_pref` is `t2s-pref`; accelerate launches modules."""

import sys

from t2s_pref.cli import main

sys.exit(main())
