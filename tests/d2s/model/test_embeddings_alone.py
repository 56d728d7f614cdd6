"""Promise 15: an embedding depends on its sample alone."""

import pytest
import torch
from model_towers import CAPTIONS, SIZE, VISION, pictures, pieces, tiny_model

from d2s.model import DecoderConfig

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("vision", VISION)
@torch.no_grad()
def test_image_alone_and_in_any_batch(vision, dtype):
    model = tiny_model(vision).to(dtype)
    images = pictures(7)
    whole = model.forward_image(images)
    assert whole.shape == (7, 16)
    torch.testing.assert_close(whole.norm(dim=1), torch.ones(7, dtype=dtype))
    for size in (1, 2, 3):
        parts = torch.cat([model.forward_image(part) for part in images.split(size)])
        torch.testing.assert_close(parts, whole, atol=TOLERANCE[dtype], rtol=0)
    shuffled = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    torch.testing.assert_close(
        model.forward_image(images[shuffled]), whole[shuffled], atol=TOLERANCE[dtype], rtol=0
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layout", ["surround", "prefix", "postfix"])
@pytest.mark.filterwarnings("ignore::d2s.model.IdleSetting")
@torch.no_grad()
def test_text_alone_and_under_any_padding(layout, dtype):
    model = tiny_model(decoder=DecoderConfig(tokens=5, depth=2, heads=2, layout=layout)).to(dtype)
    ids, mask = pieces(model, CAPTIONS)
    whole = model.forward_text(ids, mask)
    for row, text in enumerate(CAPTIONS):
        for length in (None, 40):
            alone = model.forward_text(*pieces(model, [text], length))
            for one, many in zip(alone, whole, strict=True):
                # The embeddings have a norm of about sqrt(D) here, so the tolerance grows with it.
                torch.testing.assert_close(one[0], many[row], atol=8 * TOLERANCE[dtype], rtol=0)


@torch.no_grad()
def test_padded_pieces_do_not_matter():
    model = tiny_model().double()
    ids, mask = pieces(model, CAPTIONS)
    other = torch.where(mask, ids, torch.randint_like(ids, 5, 20))
    assert not torch.equal(ids, other)
    expected = model.forward_text(ids, mask).embedding
    torch.testing.assert_close(model.forward_text(other, mask).embedding, expected, atol=1e-12, rtol=0)


@torch.no_grad()
def test_release_behaviour_breaks_the_promise():
    model = tiny_model(compat_decoder_padding=True).double()
    alone = model.forward_text(*pieces(model, ["the dog"])).embedding
    padded = model.forward_text(*pieces(model, ["the dog"], 40)).embedding
    assert (alone - padded).abs().max() > 1e-3


def test_encode_keeps_the_order_and_ignores_the_batch_size():
    model = tiny_model().train()
    texts = [CAPTIONS[number % 4] + " dog" * (number % 3) for number in range(11)]
    whole = model.encode_text(texts)
    assert model.training
    assert whole.dtype == torch.float32
    torch.testing.assert_close(whole.norm(dim=1), torch.ones(11))
    for size in (1, 4):
        torch.testing.assert_close(model.encode_text(texts, batch_size=size), whole, atol=1e-6, rtol=0)
    torch.testing.assert_close(model.encode_text(texts[7]), whole[7:8], atol=1e-6, rtol=0)
    arrays = [image.permute(1, 2, 0).numpy() for image in pictures(5, SIZE)]
    images = model.encode_image(arrays)
    torch.testing.assert_close(model.encode_image(arrays, batch_size=2), images, atol=1e-6, rtol=0)
    assert model.encode_text([]).shape == model.encode_image([]).shape == (0, 16)
