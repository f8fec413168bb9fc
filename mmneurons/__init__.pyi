# The names of `import mmneurons as mn`, in the order of the chapters.
from mmneurons.images import open_image as open_image
from mmneurons.pairs import default_pair as default_pair
from mmneurons.model import MultimodalLM as MultimodalLM
from mmneurons.data import gallery as gallery, open_data as open_data
from mmneurons.activations import Baseline as Baseline
from mmneurons.attribution import (
    attribute as attribute,
    attribute_all as attribute_all,
    top_neurons as top_neurons,
)
from mmneurons.decoding import decode as decode
from mmneurons.receptive_fields import heatmap as heatmap, receptive_field as receptive_field
from mmneurons.overlaps import overlap as overlap
from mmneurons.catalogue import find_neurons as find_neurons
from mmneurons.ablation import ablate as ablate, ablation_curve as ablation_curve
from mmneurons.studies.steering import steer as steer
from mmneurons.sweeps import sweep as sweep
from mmneurons.report import look as look

__version__: str
