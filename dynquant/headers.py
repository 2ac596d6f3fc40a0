"""What safetensors files hold, without loading it."""

from safetensors import safe_open


class Headers:
    """Names, dtypes and shapes of the tensors in safetensors files, none of which is loaded.

    Attributes:
        metadata: that of all files together.

    Raises:
        ValueError: for a file of another kind.
    """

    def __init__(self, files):
        self._files, self.metadata = {}, {}
        for file in files:
            if not str(file).endswith(".safetensors"):
                raise ValueError(
                    f"{file} is not a safetensors file; int8 layers are read from those"
                )
            with safe_open(file, framework="pt") as opened:
                self.metadata.update(opened.metadata() or {})
                self._files.update(dict.fromkeys(opened.keys(), file))  # noqa: SIM118 (no dict)

    def __iter__(self):
        return iter(self._files)

    def __contains__(self, name):
        return name in self._files

    def of(self, names):
        """(dtype, shape) of each name."""
        found = {}
        for file, own in self._by_file(names).items():
            with safe_open(file, framework="pt") as opened:
                for name in own:
                    part = opened.get_slice(name)
                    found[name] = part.get_dtype(), tuple(part.get_shape())
        return found

    def tensors(self, names):
        found = {}
        for file, own in self._by_file(names).items():
            with safe_open(file, framework="pt") as opened:
                found.update({name: opened.get_tensor(name) for name in own})
        return found

    def _by_file(self, names):
        by_file = {}
        for name in names:
            by_file.setdefault(self._files[name], []).append(name)
        return by_file
