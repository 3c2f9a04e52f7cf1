"Names that timm knows already must not be overwritten by ours: that warning is an error."

import warnings

warnings.filterwarnings('error', message='Overwriting')
import vitlit.models  # noqa: E402, F401  files all names with timm

warnings.resetwarnings()
