"""The registry of adapter methods. Each method is one file in this package and one entry in METHODS."""

from flora_train.adapters.methods.base import AdapterMethod, Params, Site, Target
from flora_train.adapters.methods.dora import Dora
from flora_train.adapters.methods.flora import Flora
from flora_train.adapters.methods.head import HeadOnly
from flora_train.adapters.methods.ia3 import Ia3
from flora_train.adapters.methods.lora import Lora
from flora_train.adapters.methods.sparse import Sparse

METHODS: dict[str, AdapterMethod] = {
    method.name: method for method in (Flora(), Lora(), Dora(), Ia3(), HeadOnly(), Sparse())
}

__all__ = ["METHODS", "AdapterMethod", "Params", "Site", "Target"]
