"""Experts in lower precisions, made ready for the presets that read them."""

from retinue.memory.files import Reader
from retinue.memory.hub_cache import name_of
from retinue.memory.link import Nested
from retinue.memory.nested_store import NestedStore, derive, nested_folder
from retinue.model.load import Network
from retinue.model.packing import source_of
from retinue.policy.base import Precision


def nested_of(network: Network, precision: Precision, reader: Reader) -> Nested | None:
    """The store that `precision` reads from, derived now if it is not there; None where it is one.

    Raises Unsupported for experts that are stored in a low precision, WriteError where the disk is
    full, and the error of a read.
    """
    if precision.exact:
        return None
    checkpoint, layouts = network.checkpoint, network.experts.layouts
    folder = nested_folder(source_of(checkpoint))
    derive(folder, layouts, reader, name_of(checkpoint.folder))
    return Nested(NestedStore(folder, layouts), precision.names)
