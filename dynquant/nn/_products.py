"""Quantized forms of several products, each of which may have a config of its own."""

from collections.abc import Mapping

from torch import nn
from typing_extensions import Self

from dynquant.nn._checks import check_config, check_parameters
from dynquant.nn._formats import Bits16, Int8, format_of
from dynquant.qconfig import ConfigLike, QConfig, one_of, parse_qconfig


class Products:
    """How such a form is made of a float module.

    Attributes:
        FLOAT, DTYPES: as of a QuantizedModule.
        MIXED: whether the products may differ; any true value.
    """

    MIXED = None

    @classmethod
    def from_float(
        cls,
        mod: nn.Module,
        qconfig: ConfigLike | None = None,
        tied_to: nn.Module | None = None,
        products: Mapping[str, ConfigLike | None] | None = None,
    ) -> Self:
        """The quantized form of `mod`, which is not changed and shares no memory with it.

        Args:
            mod, qconfig, tied_to: as for other modules.
            products: configs by the names of products, where they are not `qconfig`; None keeps a
                product in float.

        Raises:
            ValueError: as check_float.
        """
        qconfig = QConfig(dtype=cls.DTYPES[0]) if qconfig is None else parse_qconfig(qconfig)
        products = {
            name: None if config is None else parse_qconfig(config, name=name)
            for name, config in (products or {}).items()
        }
        cls.check_float(mod, qconfig, products=products)
        return cls(mod, qconfig, None if products else tied_to, products)

    @classmethod
    def check_float(
        cls,
        mod: nn.Module,
        qconfig: QConfig,
        name: str = "",
        products: Mapping[str, QConfig | None] | None = None,
    ) -> None:
        """Raises what stands against quantizing `mod`, naming its parameters after `name`.

        Args:
            products: as for from_float, parsed.

        Raises:
            ValueError: as of other modules; for a name that is not a product's.
        """
        prefix = f"{name}." if name else ""
        of_products = cls._products(mod)
        for product in products or ():
            one_of(f"{name or cls.FLOAT}: a product", product, tuple(of_products))
        if not products:
            check_config(name, cls.FLOAT, qconfig, cls.DTYPES)
        configs = {product: (products or {}).get(product, qconfig) for product in of_products}
        for product, config in configs.items():
            if products and config is not None:
                check_config(prefix + product, cls.FLOAT, config, (*Int8.DTYPES, *Bits16.DTYPES))
        weights, biases = cls._float_parameters(mod)
        check_parameters({prefix + key: value for key, value in {**weights, **biases}.items()})
        for product, (key, rows) in of_products.items():
            if configs[product] is not None:
                format_of(configs[product]).check(prefix + key, rows)

    @classmethod
    def products_of(cls, mod: nn.Module) -> tuple[str, ...]:
        """The names of the products of a float module."""
        return tuple(cls._products(mod))

    @classmethod
    def _products(cls, mod):
        """By the name of each product: the parameter that has its weight, and the weight [N, K]."""
        raise NotImplementedError

    def config_of(self, product: str) -> QConfig | None:
        """The QConfig of a product, or None where it is in float."""
        raise NotImplementedError
