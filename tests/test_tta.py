"The views of cxrkit.tta: there and back for any box, view and non-square size; pixels and boxes agree."
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from cxrkit.tta import parse_view, parse_views, unview_boxes, view_boxes, view_image

sizes = st.tuples(st.integers(16, 300), st.integers(16, 300))
flips = st.sampled_from(['', 'hflip', 'vflip', 'hflip+vflip'])
turns = st.sampled_from(['', 'rot90', 'rot180', 'rot270'])
zooms = st.floats(.5, 2).map(lambda z: f'scale{z:.3f}') | st.just('')
shifts = st.tuples(st.floats(-.3, .3), st.floats(-.3, .3)).map(lambda s: f'shift{s[0]:.3f},{s[1]:.3f}') | st.just('')
views = st.tuples(flips, turns, zooms, shifts).map(lambda words: parse_view('+'.join(w for w in words if w) or 'identity'))


@st.composite
def sized_boxes(draw):
    "A size and boxes inside it."
    height, width = draw(sizes)
    fractions = np.array(draw(st.lists(st.tuples(*[st.floats(0, 1)]*4), max_size=8)), np.float32).reshape(-1, 4)
    boxes = np.concatenate([np.minimum(fractions[:, :2], fractions[:, 2:]), np.maximum(fractions[:, :2], fractions[:, 2:])], 1)
    return (height, width), (boxes*[width, height, width, height]).astype(np.float32)


@given(sized_boxes(), views)
def test_boxes_come_home(sized, view):
    size, boxes = sized
    there = view_boxes(boxes, view, size)
    assert there.dtype == np.float32 and there.shape == boxes.shape
    assert (there[:, 2:] >= there[:, :2]).all(), 'corners in order'
    assert np.allclose(unview_boxes(there, view, size), boxes, atol=.02)


@given(sized_boxes(), views)
def test_area_grows_with_the_square_of_the_zoom(sized, view):
    size, boxes = sized
    area = lambda b: (b[:, 2]-b[:, 0]).astype(float)*(b[:, 3]-b[:, 1])
    assert np.allclose(area(view_boxes(boxes, view, size)), area(boxes)*view.zoom**2, rtol=1e-3, atol=.5)


@settings(max_examples=60)
@given(sizes, st.tuples(flips, turns).map(lambda w: parse_view('+'.join(x for x in w if x) or 'identity')), st.integers(0, 2**31))
def test_exact_views_move_pixels_as_boxes(size, view, seed):
    "Flips and turns are permutations: each pixel's unit box lands where the pixel lands."
    image = np.random.default_rng(seed).integers(0, 256, size, np.uint8)
    seen = view_image(image, view)
    assert seen.shape == view.out_size(size)
    rows, columns = np.random.default_rng(seed).integers(0, size, (20, 2)).T
    corners = view_boxes(np.stack([columns, rows, columns+1, rows+1], 1), view, size).round().astype(int)
    assert (seen[corners[:, 1], corners[:, 0]] == image[rows, columns]).all()


@settings(max_examples=60)
@given(sizes, views)
def test_a_drawn_block_is_found_where_its_box_says(size, view):
    height, width = size
    x1, y1, x2, y2 = width//3, height//4, width-width//4, height-height//5
    image = np.zeros(size, np.uint8); image[y1:y2, x1:x2] = 255
    expected = view_boxes([[x1, y1, x2, y2]], view, size)[0]
    out_height, out_width = view.out_size(size)
    expected = np.clip(expected, 0, [out_width, out_height]*2)
    if min(expected[2]-expected[0], expected[3]-expected[1]) < 3: return
    ys, xs = np.nonzero(view_image(image, view) > 127)
    assert np.abs(expected-[xs.min(), ys.min(), xs.max()+1, ys.max()+1]).max() <= 1.01*max(1, view.zoom)


@pytest.mark.parametrize('name', ['identity', 'hflip', 'rot90', 'scale0.8', 'shift0.1,0'])
def test_batches_are_viewed_like_single_images(name):
    batch = np.random.default_rng(0).integers(0, 256, (3, 1, 20, 31), np.uint8)
    view = parse_view(name)
    seen = view_image(batch, view)
    assert seen.dtype == np.uint8 and seen.flags['C_CONTIGUOUS']
    assert all((seen[i, 0] == view_image(batch[i, 0], view)).all() for i in range(3))


@pytest.mark.parametrize('name,message', [
    ('mirror', "unknown word 'mirror'"), ('', 'unknown word'), ('scale0', 'scale outside'), ('scale-2', 'scale outside'),
    ('hflip+hflip', 'given twice'), ('rot90+rot180', 'given twice'), ('shift3,0', 'fraction of the image'), ('scale', 'unknown word')])
def test_bad_views_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        parse_view(name)


def test_bad_lists_of_views_are_refused():
    with pytest.raises(ValueError, match='none given'):
        parse_views('')
    with pytest.raises(ValueError, match='counted twice'):
        parse_views(('hflip', 'hflip'))
