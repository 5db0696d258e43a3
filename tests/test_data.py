import hashlib
import os
import sys

import pytest
import torch
from torch import nn

from kfac_fast import data

# First 16 digits of the SHA-256 of the grey levels of the training and of the test images.
CHECKSUMS = ("fbda5b24d92214d6", "b90f9953e0e2f571")


@pytest.fixture(autouse=True)
def cache_home(tmp_path, monkeypatch):
    """Keeps the tests away from the user's own cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def images():
    return data.curves(n_train=1000, n_test=200, seed=0, cache=False)


def grey_levels(images):
    return (images * 255).round().to(torch.uint8)


def checksum(images):
    return hashlib.sha256(bytes(grey_levels(images).flatten().tolist())).hexdigest()[:16]


def damage(path, change):
    path.write_bytes(change(path.read_bytes()))


class TestCurves:
    def test_shapes_and_range(self, images):
        assert images.train.shape == (1000, 784)
        assert images.test.shape == (200, 784)
        for part in images:
            assert part.dtype == torch.float32
            assert part.min() == 0
            assert part.max() == 1
            assert torch.equal(grey_levels(part).float() / 255, part)

    def test_pixels_are_the_ones_recorded(self, images):
        assert (checksum(images.train), checksum(images.test)) == CHECKSUMS

    def test_same_seed_same_images_other_seed_others(self, images):
        again = data.curves(n_train=1000, n_test=200, seed=0, cache=False)
        assert torch.equal(again.train, images.train)
        assert torch.equal(again.test, images.test)
        assert not torch.equal(data.curves(n_train=1000, n_test=0, seed=1, cache=False).train, images.train)

    def test_first_images_do_not_depend_on_the_sizes(self, images):
        fewer = data.curves(n_train=130, n_test=5, seed=0, cache=False)
        assert torch.equal(fewer.train, images.train[:130])
        assert torch.equal(fewer.test, images.test[:5])

    def test_global_random_state_is_left_alone(self):
        before = torch.get_rng_state()
        data.curves(n_train=3, n_test=3, cache=False)
        assert torch.equal(torch.get_rng_state(), before)

    def test_no_image_repeats_within_or_between_the_parts(self, images):
        assert len(torch.cat(images).unique(dim=0)) == 1200

    def test_ink_is_that_of_a_stroke(self, images):
        ink = images.train.mean(1)
        assert 0.06 < ink.mean() < 0.09
        assert ink.min() > 0.008  # a dot of the stroke's width: no image is blank
        assert ink.max() < 0.2

    def test_strokes_have_soft_edges(self, images):
        grey = ((images.train > 0) & (images.train < 1)).float().sum(1)
        assert (grey > 0).all()

    def test_ink_is_symmetric_about_both_axes(self, images):
        """The points are uniform over a square, so the mean image has its symmetries."""
        mean = images.train.mean(0).view(28, 28)
        for other in (mean.flip(0), mean.flip(1), mean.T):
            assert (mean - other).abs().max() < 0.06

    def test_every_image_is_one_connected_stroke(self, images):
        for image in images.test[:100]:
            inked = image.view(1, 1, 28, 28) > 0
            reached = torch.zeros_like(inked)
            reached.view(-1)[inked.flatten().float().argmax()] = True
            for _ in range(150):  # spread to the eight neighbours that carry ink
                reached = (nn.functional.max_pool2d(reached.float(), 3, stride=1, padding=1) > 0) & inked
            assert torch.equal(reached, inked)

    def test_curve_passes_through_its_points(self):
        points = 28 * torch.rand(50, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        nodes = data._smooth_curve(points)
        torch.testing.assert_close(nodes[0], points[:, 0])
        torch.testing.assert_close(nodes[-1], points[:, 2])
        nearest = (nodes - points[:, 1]).norm(dim=-1).amin(0)
        step = (nodes[1:] - nodes[:-1]).norm(dim=-1).amax(0)
        assert (nearest <= step).all()

    def test_distance_to_a_straight_line(self):
        nodes = torch.tensor([[4.0, 14.0], [10.0, 14.0], [24.0, 14.0]], dtype=torch.float64)[:, None]
        distance = data._distance_to_polyline(nodes)[0]
        assert distance[13, 12] == 0.5  # beside the line
        assert distance[20, 12] == 6.5
        torch.testing.assert_close(distance[16, 0].item(), (3.5**2 + 2.5**2) ** 0.5)  # beyond its end

    @pytest.mark.parametrize("coincide", [(0, 1), (1, 2), (0, 2), (0, 1, 2)])
    def test_points_that_coincide_draw_a_stroke(self, coincide):
        points = torch.tensor([[[5.0, 5.0], [14.0, 20.0], [22.0, 9.0]]], dtype=torch.float64)
        points[:, list(coincide)] = 14.25
        distance = data._distance_to_polyline(data._smooth_curve(points))
        assert distance.isfinite().all()
        assert distance.min() < 0.5

    def test_no_images_asked_for(self):
        assert data.curves(n_train=0, n_test=0, cache=False).train.shape == (0, 784)

    @pytest.mark.parametrize("name", ["n_train", "n_test", "seed"])
    def test_bad_arguments_are_named(self, name):
        with pytest.raises(ValueError, match=rf"{name} must be at least 0, got {name}=-1"):
            data.curves(**{name: -1})
        for value in (2.0, "2", True):
            with pytest.raises(TypeError, match=rf"{name} must be an int, got {name}={value!r}"):
                data.curves(**{name: value})


class TestCache:
    SIZES = {"n_train": 20, "n_test": 10}  # noqa: RUF012 - a constant

    @pytest.fixture
    def kept(self, cache_home):
        data.curves(**self.SIZES)
        (path,) = (cache_home / "kfac_fast").iterdir()
        return path

    @pytest.fixture
    def no_drawing(self, monkeypatch):
        def refuse(n, seed):
            raise AssertionError("the images were drawn again")

        monkeypatch.setattr(data, "_draw_curves", refuse)

    def test_second_call_reads_the_file(self, kept, no_drawing):
        again = data.curves(**self.SIZES)
        assert again.train.shape == (20, 784)
        assert again.test.shape == (10, 784)

    def test_read_images_equal_the_drawn_ones(self, kept):
        for read, drawn in zip(data.curves(**self.SIZES), data.curves(**self.SIZES, cache=False), strict=True):
            assert torch.equal(read, drawn)

    @pytest.mark.usefixtures("kept", "no_drawing")
    @pytest.mark.parametrize("other", [{"n_train": 21}, {"n_test": 11}, {"seed": 1}])
    def test_other_arguments_do_not_read_it(self, other):
        with pytest.raises(AssertionError, match="drawn again"):
            data.curves(**{**self.SIZES, **other})

    @pytest.mark.parametrize(
        "change",
        [
            lambda content: b"",
            lambda content: content[:-1],
            lambda content: content[:70],
            lambda content: content.replace(b"\n", b"", 1),
            lambda content: content[:-200] + bytes([content[-200] ^ 1]) + content[-199:],
            lambda content: b"not an archive",
        ],
        ids=["empty", "cut short", "cut very short", "no first line", "one bit flipped", "something else"],
    )
    def test_damaged_file_is_replaced(self, kept, change):
        good = kept.read_bytes()
        damage(kept, change)
        assert torch.equal(data.curves(**self.SIZES).train, data.curves(**self.SIZES, cache=False).train)
        assert kept.read_bytes() == good

    def test_file_of_another_version_is_replaced(self, kept, monkeypatch):
        old = kept.read_bytes()
        monkeypatch.setattr(data, "_CURVES_VERSION", data._CURVES_VERSION + 1)
        data.curves(**self.SIZES)
        assert kept.read_bytes() != old

    def test_write_that_fails_leaves_nothing_behind(self, cache_home, monkeypatch):
        def disk_full(source, target):
            assert source != target
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "replace", disk_full)
        with pytest.warns(RuntimeWarning, match="not kept for next time.*No space left"):
            images = data.curves(**self.SIZES)
        assert images.train.shape == (20, 784)
        assert list((cache_home / "kfac_fast").iterdir()) == []

    def test_failing_write_leaves_the_old_file(self, kept, monkeypatch):
        damage(kept, lambda content: b"damaged")
        monkeypatch.setattr(os, "replace", lambda source, target: (_ for _ in ()).throw(OSError("no")))
        with pytest.warns(RuntimeWarning, match="not kept"):
            data.curves(**self.SIZES)
        assert kept.read_bytes() == b"damaged"
        assert list(kept.parent.iterdir()) == [kept]

    def test_folder_that_cannot_be_made(self, cache_home, monkeypatch):
        (cache_home / "file").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache_home / "file"))
        with pytest.warns(RuntimeWarning, match="not kept"):
            assert data.curves(**self.SIZES).train.shape == (20, 784)

    def test_off_writes_nothing(self, cache_home):
        data.curves(**self.SIZES, cache=False)
        assert list(cache_home.iterdir()) == []

    @pytest.mark.parametrize("value", [None, "", "relative/folder"])
    def test_default_folder(self, cache_home, monkeypatch, value):
        monkeypatch.setenv("HOME", str(cache_home))
        if value is None:
            monkeypatch.delenv("XDG_CACHE_HOME")
        else:
            monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert data._cache_folder() == cache_home / ".cache" / "kfac_fast"


class TestDigits:
    def test_shapes_range_and_split(self):
        pytest.importorskip("sklearn")
        digits = data.digits()
        assert [tuple(part.shape) for part in digits] == [(1437, 64), (1437,), (360, 64), (360,)]
        for images, labels in (digits[:2], digits[2:]):
            assert images.dtype == torch.float32
            assert images.min() == 0
            assert images.max() == 1
            assert labels.dtype == torch.int64
            assert labels.bincount().min() > 0.07 * len(labels)
        for first, second in zip(digits, data.digits(), strict=True):
            assert torch.equal(first, second)

    def test_split_keeps_every_digit_once(self):
        load = pytest.importorskip("sklearn.datasets").load_digits
        digits = data.digits()
        split = torch.cat([torch.cat([digits.train_images, digits.test_images]).mul(16), labels_of(digits)], 1)
        images, labels = load(return_X_y=True)
        whole = torch.cat([torch.as_tensor(images).float(), torch.as_tensor(labels).float()[:, None]], 1)
        assert torch.equal(torch.tensor(sorted(split.tolist())), torch.tensor(sorted(whole.tolist())))

    def test_without_scikit_learn(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
        with pytest.raises(ImportError, match=r"pip install kfac-fast\[demo\]"):
            data.digits()


def labels_of(digits):
    return torch.cat([digits.train_labels, digits.test_labels]).float()[:, None]


class TestAutoencoder:
    def test_layers(self):
        model = data.curves_autoencoder()
        linear = [module for module in model if isinstance(module, nn.Linear)]
        widths = [layer.in_features for layer in linear] + [linear[-1].out_features]
        assert widths == [784, 400, 200, 100, 50, 25, 6, 25, 50, 100, 200, 400, 784]
        code = list(model).index(linear[5])
        assert linear[5].out_features == 6
        assert isinstance(model[code + 1], nn.Linear)  # the code layer is linear,
        assert isinstance(model[-1], nn.Linear)  # the output a logit,
        rest = [module for module in model if not isinstance(module, nn.Linear)]
        assert len(rest) == 10  # and all else logistic
        assert all(isinstance(module, nn.Sigmoid) for module in rest)

    def test_same_generator_same_weights(self):
        first, second = (data.curves_autoencoder(generator=torch.Generator().manual_seed(3)) for _ in range(2))
        for p, q in zip(first.parameters(), second.parameters(), strict=True):
            assert torch.equal(p, q)

    def test_units_answer_differently_to_different_images(self, images):
        model = data.curves_autoencoder(generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            assert model(images.test).std(0).mean() > 1e-3


class TestSparseInit:
    @pytest.mark.parametrize("incoming", [1, 15, 40, 100])
    def test_weights_per_unit(self, incoming):
        model = nn.Sequential(nn.Linear(40, 30), nn.Sigmoid(), nn.Linear(30, 6), nn.Linear(6, 9, bias=False))
        assert data.sparse_init_(model, incoming, torch.Generator().manual_seed(0)) is model
        for layer in (model[0], model[2], model[3]):
            assert (layer.weight.count_nonzero(1) == min(incoming, layer.in_features)).all()
            assert layer.bias is None or not layer.bias.any()

    def test_fifteen_by_default_and_in_the_autoencoder(self):
        for module in data.curves_autoencoder():
            if isinstance(module, nn.Linear):
                assert (module.weight.count_nonzero(1) == min(15, module.in_features)).all()

    def test_weights_are_standard_normal_and_inputs_chosen_evenly(self):
        layer = data.sparse_init_(nn.Linear(50, 4000), generator=torch.Generator().manual_seed(0))
        values = layer.weight[layer.weight != 0].detach()
        assert abs(values.mean()) < 0.02
        assert abs(values.std() - 1) < 0.02
        share = layer.weight.count_nonzero(0) / 4000
        assert (share - 15 / 50).abs().max() < 0.035

    def test_other_dtype_and_other_layers_untouched(self):
        model = nn.Sequential(nn.Linear(20, 4, dtype=torch.float64), nn.LayerNorm(4))
        data.sparse_init_(model)
        assert model[0].weight.dtype == torch.float64
        assert (model[1].weight == 1).all()

    def test_bad_arguments_are_named(self):
        with pytest.raises(ValueError, match="incoming must be at least 1, got incoming=0"):
            data.sparse_init_(nn.Linear(3, 3), incoming=0)
        with pytest.raises(TypeError, match=r"incoming must be an int, got incoming=1.5"):
            data.sparse_init_(nn.Linear(3, 3), incoming=1.5)
        with pytest.raises(ValueError, match=r"model must have at least one nn.Linear, got Sigmoid without any"):
            data.sparse_init_(nn.Sigmoid())
