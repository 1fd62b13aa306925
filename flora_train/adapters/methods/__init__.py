"""The registry of adapter methods. Each method is one file in this package and one entry in METHODS."""

from flora_train.adapters.methods.base import AdapterMethod, Params, Site, Target, TargetMember
from flora_train.adapters.methods.dora import Dora
from flora_train.adapters.methods.flora import Flora
from flora_train.adapters.methods.head import HeadOnly
from flora_train.adapters.methods.ia3 import Ia3
from flora_train.adapters.methods.lora import Lora
from flora_train.adapters.methods.meteora import Meteora
from flora_train.adapters.methods.mixlora import MixLora
from flora_train.adapters.methods.sparse import Sparse
from flora_train.adapters.methods.switch import Switch

PLAIN: tuple[AdapterMethod, ...] = (Flora(), Lora(), Dora(), Ia3(), HeadOnly(), Sparse())
ROUTED: tuple[AdapterMethod, ...] = (MixLora(), Meteora(), Switch())
METHODS: dict[str, AdapterMethod] = {method.name: method for method in (*PLAIN, *ROUTED)}

__all__ = ["METHODS", "AdapterMethod", "Params", "Site", "Target", "TargetMember"]
