// Which query may see which key, told by numbers and never materialised.
// p.mask    0 full, 1 block-causal over positions (causal when p.block is 1), 2 two-copy
// p.block   tokens in a block; p.length: L; p.q_start: position of query row 0 (masks 0 and 1)
// Two-copy rows are [noisy 0..L, clean L..2L]; a noisy block sees itself and the clean blocks before it, a
// clean block sees the clean blocks up to itself. With HAS_SPANS a token also stays in its document:
// spans[b, position] = (first, end) over positions, both nondecreasing.
override HAS_SPANS: u32 = 0u;
const TWO_COPY: u32 = 2u;

fn span(batch: u32, position: u32) -> vec2<u32> {
    if HAS_SPANS == 0u {
        return vec2<u32>(0u, p.length);
    }
    let at = (batch * p.length + position) * 2u;
    return vec2<u32>(spans[at], spans[at + 1u]);
}

fn allowed(batch: u32, q: u32, k: u32) -> bool {
    let two = p.mask == TWO_COPY;
    let q_clean = two && q >= p.length;
    let k_clean = two && k >= p.length;
    let q_at = q + select(p.q_start, 0u, two) - select(0u, p.length, q_clean);
    let k_at = k - select(0u, p.length, k_clean);
    if HAS_SPANS == 1u {
        let s = span(batch, q_at);
        if k_at < s.x || k_at >= s.y {
            return false;
        }
    }
    let q_block = q_at / p.block;
    let k_block = k_at / p.block;
    if !two {
        return p.mask == 0u || q_block >= k_block;
    }
    if q_clean {
        return k_clean && q_block >= k_block;
    }
    return select(q_block == k_block, q_block > k_block, k_clean);
}

// Two ranges of rows, [x, y) and [z, w), that hold every allowed partner; either may be empty.
fn clip(range: vec2<u32>, low: u32, high: u32) -> vec2<u32> {
    let first = max(range.x, low);
    return vec2<u32>(first, max(first, min(range.y, high)));
}

// Keys for the query rows first..=last, which lie in one half.
fn keys_of(batch: u32, first: u32, last: u32) -> vec4<u32> {
    let length = p.length;
    if p.mask != TWO_COPY {
        let low = span(batch, first + p.q_start).x;
        let high = span(batch, last + p.q_start).y;
        let end = select(p.tk, ((last + p.q_start) / p.block + 1u) * p.block, p.mask == 1u);
        return vec4<u32>(clip(vec2<u32>(0u, min(end, p.tk)), low, high), 0u, 0u);
    }
    let half = select(0u, length, first >= length);
    let low = span(batch, first - half).x;
    let high = span(batch, last - half).y;
    let block = (last - half) / p.block;
    let own = clip(vec2<u32>((first / p.block) * p.block, (block + 1u) * p.block), low, high);
    let before = select(block, block + 1u, half > 0u) * p.block;
    let clean = clip(vec2<u32>(0u, min(before, length)), low, high) + length;
    return vec4<u32>(select(own, vec2<u32>(), half > 0u), clean);
}

// Queries for the key rows first..=last, which lie in one half.
fn queries_of(batch: u32, first: u32, last: u32) -> vec4<u32> {
    let length = p.length;
    if p.mask != TWO_COPY {
        let low = max(span(batch, first).x, p.q_start) - p.q_start;
        let high = max(span(batch, last).y, p.q_start) - p.q_start;
        let begin = select(0u, (first / p.block) * p.block, p.mask == 1u);
        let rows = vec2<u32>(max(begin, p.q_start) - p.q_start, p.tq);
        return vec4<u32>(clip(rows, low, high), 0u, 0u);
    }
    let half = select(0u, length, first >= length);
    let low = span(batch, first - half).x;
    let high = span(batch, last - half).y;
    let begin = ((first - half) / p.block) * p.block;
    if half == 0u {
        let end = (last / p.block + 1u) * p.block;
        return vec4<u32>(clip(vec2<u32>(begin, end), low, high), 0u, 0u);
    }
    let noisy = clip(vec2<u32>(begin + p.block, length), low, high);
    return vec4<u32>(noisy, clip(vec2<u32>(begin, length), low, high) + length);
}

// Rows of a tile of 8: (first row, rows), tiles never crossing from one half to the other.
fn tile_rows(tile: u32, rows: u32) -> vec2<u32> {
    let half_rows = select(rows, p.length, p.mask == TWO_COPY);
    let tiles = (half_rows + 7u) / 8u;
    let within = (tile % tiles) * 8u;
    return vec2<u32>((tile / tiles) * half_rows + within, min(8u, half_rows - within));
}
