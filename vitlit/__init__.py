"""Five papers on spatial structure in vision transformers, in one skeleton with slots.

Models:      from vitlit.models import pit_s, model_table; model_table() lists all of them
Training:    from vitlit.train import vit_learner
Explaining:  from vitlit.explain import explain, show_maps
Each module is exported from the notebook of its name in nbs/; README.md says where to start.
"""

__version__ = "0.1.0"
