"""The packed form of a model's weights: what stands where the parameters stood."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from hire_rewrite.errors import HireRewriteError
from hire_rewrite.names import first_names
from hire_rewrite.origin import check_origin
from hire_rewrite.packed_info import PackedInfo
from hire_rewrite.positional import by_position
from hire_rewrite.rules import Rule
from hire_rewrite.unexported import refuse_to_export

if TYPE_CHECKING:
    from hire_rewrite.transformed import Transformed


def _renamed(tree: Any, names: Mapping[str, str]) -> Any:
    """A tree with other names, if it is one of arrays and not what stands for it."""
    if not isinstance(tree, dict):
        return tree
    return {names.get(name, name): value for name, value in tree.items()}


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class Packed:
    """A pytree of arrays, made by `pack` and passed where the weights stood.

    In a checkpoint its arrays do not have the name of the argument that held the weights, if there
    was one alone: a function that calls it otherwise can load them. It is equal to itself alone:
    `check` compares it with weights.

    Examples:
      >>> import jax.numpy as jnp, hire_rewrite as hire
      >>> step = hire.transform(lambda params, x: x @ params["vocabulary"])
      >>> weights = jnp.sin(jnp.arange(128.0)).reshape(8, 16)
      >>> step.pack({"vocabulary": weights}, jnp.zeros((1, 8)))
      Packed(1 weights, 0 sites, 0.0 MB)

    Attributes:
      weights: the weights that the rewritten function still reads, by path. The dense copies of
        rewritten weights are not among them (a tied embedding stays).
      sites: for each rewritten site its rows, row-major, and what its predictor needs.
      info: the static part, which says what was packed and how.
    """

    weights: dict[str, jax.Array]
    sites: dict[str, Any]
    info: PackedInfo

    def tree_flatten(self) -> tuple[tuple[Any, Any], PackedInfo]:
        """Its arrays under names that do not depend on the argument's."""
        trees = zip((self.weights, self.sites), self.info.short_names, strict=True)
        weights, sites = (_renamed(tree, short) for tree, short in trees)
        return (weights, sites), self.info

    def tree_flatten_with_keys(self) -> tuple[Any, PackedInfo]:
        """The same with the names of its two trees."""
        trees, info = self.tree_flatten()
        keys = map(jax.tree_util.GetAttrKey, ("weights", "sites"))
        return tuple(zip(keys, trees, strict=True)), info

    @classmethod
    def tree_unflatten(cls, info: PackedInfo, trees: Any) -> Packed:
        """The `Packed` of some leaves, or of what JAX and others put in the place of its trees."""
        names = ({short: name for name, short in known.items()} for known in info.short_names)
        weights, sites = map(_renamed, trees, names)
        if info.origin.fingerprint is not None and any(
            isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((weights, sites))
        ):
            info = info.without_fingerprint
        return cls(weights, sites, info)

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rules that make a `Packed` like this one, anywhere: all sizes are written out, and
        nothing is left to a machine's estimate. With `save_rules` they go beside a checkpoint, and
        `transform(fn, *rules)` packs shapes to what it is restored to."""
        return self.info.rules

    @property
    def arrays(self) -> dict[str, jax.Array]:
        """Its arrays in a plain dictionary, for what knows nothing of this package: exported
        programs, files. A weight has the name of its path, an array of a site the site's name and
        what it is there: `embed:rows/scale`. `with_arrays` is the way back.

        Examples:
          >>> import jax.numpy as jnp, hire_rewrite as hire
          >>> step = hire.transform(lambda params, x: x @ params["vocabulary"])
          >>> weights = jnp.sin(jnp.arange(128.0)).reshape(8, 16)
          >>> packed = step.pack({"vocabulary": weights}, jnp.zeros((1, 8)))
          >>> list(packed.arrays), packed.with_arrays(packed.arrays)
          (['vocabulary'], Packed(1 weights, 0 sites, 0.0 MB))
        """
        return dict(zip(self._named(str), jax.tree.leaves(self), strict=True))

    def with_arrays(self, arrays: Mapping[str, Any]) -> Packed:
        """This one with other arrays, those of a dictionary like `arrays`. If their numbers are
        others, nobody knows what they were made of, and `check` refuses them.

        Raises:
          HireRewriteError: names are missing, or are not of this `Packed`.
        """
        if not isinstance(arrays, Mapping):
            raise HireRewriteError(
                f"with_arrays: the arrays are a {type(arrays).__name__}: give a dict like "
                "Packed.arrays"
            )
        names = [*self._named(str)]
        for what, odd in (("lack", set(names) - set(arrays)), ("have", set(arrays) - set(names))):
            if odd:
                raise HireRewriteError(
                    f"with_arrays: the arrays {what} {first_names(sorted(odd))}, unlike this "
                    "Packed: give those of Packed.arrays of one with the same rules and shapes"
                )
        return jax.tree.unflatten(jax.tree.structure(self), [arrays[name] for name in names])

    @property
    def paths(self) -> tuple[str, ...]:
        """A name for each array, in the order of `jax.tree.leaves`: as in `arrays`, with the name
        of the argument that held the weights."""
        known = self.info.short_names
        long = {short: name for names in known for name, short in names.items()}
        return tuple(self._named(lambda name: long.get(name, name)))

    def _named(self, written: Callable[[str], str]) -> Iterator[str]:
        """A name for each array, those of weights and sites written somehow."""
        trees, _ = self.tree_flatten()
        for path, _ in jax.tree_util.tree_leaves_with_path(trees):
            inside = jax.tree_util.keystr(path[2:], simple=True, separator="/")
            yield written(path[1].key) + (f":{inside}" if inside else "")

    def check(self, *weights: Any) -> None:
        """Check the arrays against what was packed and, if they are given, the weights themselves.

        An update is seen in two thousand numbers of each weight, at random places: what changes one
        in a hundred of its numbers or more, wherever they are. What changes fewer, such as a few
        rows of a large embedding, may go unseen.

        Args:
          weights: the arguments that hold the weights, in order.

        Examples:
          >>> import jax.numpy as jnp, hire_rewrite as hire
          >>> step = hire.transform(lambda params, x: x @ params["vocabulary"])
          >>> params = {"vocabulary": jnp.sin(jnp.arange(128.0)).reshape(8, 16)}
          >>> packed = step.pack(params, jnp.zeros((1, 8)))
          >>> packed.check(params)
          >>> packed.check({"vocabulary": 0.99 * params["vocabulary"]})  # doctest: +ELLIPSIS
          Traceback (most recent call last):
          hire_rewrite.errors.HireRewriteError: params/vocabulary has changed since it was packed...

        Raises:
          HireRewriteError: an array has not the shape and dtype that it was packed with; a weight
            is not the one that was packed, or is deleted; or nobody knows, as it was packed in a
            trace, or given other arrays (by restoring into it, or `jax.tree.map`).
        """
        leaves = jax.tree_util.tree_leaves_with_path((self.weights, self.sites))
        if len(leaves) != len(self.info.shapes):
            raise HireRewriteError(
                f"the Packed has {len(leaves)} arrays, but was packed with "
                f"{len(self.info.shapes)}: restore all of them, or pack again from the weights"
            )
        for (path, leaf), want in zip(leaves, self.info.shapes, strict=True):
            shape, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
            if (shape, dtype) != (want.shape, want.dtype):
                found = type(leaf).__name__ if shape is None else f"{dtype}{list(shape)}"
                raise HireRewriteError(
                    f"Packed{jax.tree_util.keystr(path[1:])} is {found} but "
                    f"was packed for {want.dtype}{list(want.shape)}: pack again from the weights "
                    "instead of changing the packed arrays"
                )
        if weights:
            self._check_origin("check", weights)

    def _check_origin(self, name: str, weights: Sequence[Any], *, known: bool = True) -> None:
        """`origin.check_origin` of its arrays, none of which may be deleted."""
        leaves, origin = jax.tree.leaves(self), self.info.origin
        check_not_deleted(name, self.paths, leaves)
        given = jax.tree.leaves(tuple(weights))
        if len(given) == len(origin.paths):  # else they are of another structure
            check_not_deleted(name, origin.paths, given)
        with jax.transfer_guard("allow"):
            check_origin(origin, leaves, weights, known=known)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a directory (Orbax), or to one file if the path ends in `.safetensors`.

        A file is replaced when the new one is complete; of a link, what it is a link to. `~` is the
        user's directory. A directory holds sharded arrays, which several processes may write
        together and which go to any number of devices; it must not be there yet. It needs
        `pip install orbax-checkpoint`.

        Raises:
          HireRewriteError: the arrays are shapes or traced, the path is taken, or something that is
            needed is not installed.
        """
        from hire_rewrite.checkpoint import save

        save(self, path)

    @classmethod
    @by_position
    def load(
        cls, path: str | os.PathLike[str], step: Transformed, /, *args: Any, **kwargs: Any
    ) -> Packed:
        """What `save` wrote, for a function: the dense weights are not needed.

        The function is traced and packed as shapes, and what the checkpoint holds must be that;
        each array has a checksum.

        Args:
          path, step: by position; where it was saved, and the function, transformed with the rules
            that it was packed with, or with those that `load_rules(path)` returns.
          args, kwargs: a call's arguments as for `step.pack`, arrays or shapes; where arrays are to
            be sharded, weights have shardings. Without them they are those that it was packed for,
            if the weights were in dicts, lists and tuples and the call is not large for the
            checkpoint (more than 4096 along an axis, in a small one), and are put on one device.

        Raises:
          HireRewriteError: the checkpoint is damaged or incomplete, or is of another model, shape,
            rule or version; or the arguments are needed.
        """
        from hire_rewrite.checkpoint import load

        return load(path, step, args, kwargs)

    def __repr__(self) -> str:
        leaves = jax.tree.leaves((self.weights, self.sites))
        arrays = [leaf for leaf in leaves if hasattr(leaf, "shape") and hasattr(leaf, "dtype")]
        size = sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays)
        return f"Packed({len(self.weights)} weights, {len(self.sites)} sites, {size / 1e6:.1f} MB)"


refuse_to_export(
    Packed,
    "a Packed is an argument of the exported function, and no program that is "
    "serialized can have one, for only this package knows its structure: export `lambda "
    "arrays, *rest: step(packed.with_arrays(arrays), *rest)` and give it packed.arrays",
)


def check_arrays(name: str, packed: Packed | None) -> None:
    """Raise HireRewriteError if a `Packed`, given to the function of this name, holds what nothing
    can be computed with."""
    if packed is None:
        return
    leaves = jax.tree.leaves(packed)
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
        raise HireRewriteError(
            f"{name}: the Packed was made of shapes, and holds no arrays to compute with: "
            "restore a checkpoint into it, or pack the weights themselves"
        )
    packed.check()
    check_not_deleted(name, packed.paths, leaves)
    check_widths(name, packed)


def check_widths(name: str, packed: Packed) -> None:
    """Raise HireRewriteError if a `Packed`, given to the function of this name, holds numbers of 64
    bits where JAX has none; its arrays may be traced."""
    leaves = jax.tree.leaves(packed)
    wide = [leaf.dtype for leaf in leaves if _is_wider_than_allowed(leaf.dtype)]
    if wide:
        raise HireRewriteError(
            f"{name}: the Packed holds numbers of {wide[0]}, and was packed with jax_enable_x64: "
            "call with it, or pack again without"
        )


def _is_wider_than_allowed(dtype: Any) -> bool:
    """Whether JAX would narrow it, as jax_enable_x64 is off."""
    extended = jnp.issubdtype(dtype, jax.dtypes.extended)
    return not extended and jax.dtypes.canonicalize_dtype(dtype) != dtype


def check_devices(name: str, packed: Packed | None) -> None:
    """Raise HireRewriteError if arrays of a `Packed`, given to the function of this name, are on
    other devices than those of the mesh that it was packed over."""
    specs = () if packed is None else packed.info.origin.specs
    shardings = [getattr(spec, "sharding", None) for spec in specs]
    meshes = [some.mesh for some in shardings if isinstance(some, NamedSharding)]
    if packed is None or not meshes or not isinstance(meshes[0], Mesh):
        return
    over = [*meshes[0].devices.flat]
    arrays = zip(packed.paths, jax.tree.leaves(packed), strict=True)
    for path, leaf in ((path, leaf) for path, leaf in arrays if isinstance(leaf, jax.Array)):
        sharding: Any = leaf.sharding
        here = [*(sharding.mesh.devices.flat if hasattr(sharding, "mesh") else leaf.devices())]
        if here != over:
            places = (", ".join(map(str, some[:8])) for some in (here, over))
            raise HireRewriteError(
                "{}: {} lies on {}, and was packed over the mesh of {}: put it there again, or "
                "pack or load it for the devices that it is to be on".format(name, path, *places)
            )


def check_not_deleted(name: str, paths: Sequence[str], leaves: Sequence[Any]) -> None:
    """Raise HireRewriteError if an array, given to the function of this name, is there no more."""
    for path, leaf in zip(paths, leaves, strict=True):
        tracer = isinstance(leaf, jax.core.Tracer)
        if isinstance(leaf, jax.Array) and not tracer and leaf.is_deleted():
            raise HireRewriteError(
                f"{name}: {path} was deleted, or donated to another function. A Packed holds the "
                "weights that stay dense as they are, and no copies: pack again from the weights "
                "as they are now, or give copies to what donates them"
            )
