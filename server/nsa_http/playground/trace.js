// What one answer's tokens read: facts about the model, and blocks for each token.

export class Trace {
  constructor() {
    this.facts = null;
    this.promptIds = [];
    this.ids = [];
    this.blocks = []; // [token][layer][head][ascending block ids]
    this.readBytes = [];
    this.denseBytes = [];
    this.isTruncated = false;
    this.shares = null; // of the whole answer, made when first asked for
  }

  add(part) {
    const { tokens, read_bytes, dense_bytes, truncated, position, ...facts } = part;
    this.facts ??= facts;
    this.first ??= position;
    this.blocks.push(...tokens);
    this.readBytes.push(...read_bytes);
    this.denseBytes.push(...dense_bytes);
    this.isTruncated ||= truncated;
    this.shares = null;
  }

  get length() {
    return this.blocks.length;
  }

  // Tokens that the query of output token i could attend to, its own included.
  contextLength(i) {
    return this.first + i + 1;
  }

  numBlocks(i) {
    return Math.ceil(this.contextLength(i) / this.facts.block_size);
  }

  get numHeads() {
    return this.facts.layers.length * this.facts.num_kv_heads;
  }

  // [row] -> Float32Array of the share of tokens from `from` to `to` that read each block.
  sharesOf(from, to) {
    const isWhole = from === 0 && to === this.length;
    if (isWhole && this.shares) return this.shares;
    const { layers, num_kv_heads } = this.facts;
    const numBlocks = this.numBlocks(to - 1);
    const rows = Array.from({ length: this.numHeads }, () => new Float32Array(numBlocks));
    for (let i = from; i < to; i++) {
      for (let layer = 0; layer < layers.length; layer++) {
        for (let head = 0; head < num_kv_heads; head++) {
          const row = rows[layer * num_kv_heads + head];
          for (const block of this.blocks[i][layer][head]) row[block] += 1 / (to - from);
        }
      }
    }
    if (isWhole) this.shares = rows;
    return rows;
  }

  // Means over the tokens: blocks a head reads, visible blocks, share of the context, bytes.
  figures(from, to) {
    const size = this.facts.block_size;
    let read = 0, visible = 0, share = 0, bytes = 0, dense = 0;
    for (let i = from; i < to; i++) {
      const length = this.contextLength(i);
      let blocks = 0, tokens = 0;
      for (const heads of this.blocks[i]) {
        for (const chosen of heads) {
          blocks += chosen.length;
          for (const block of chosen) tokens += Math.min((block + 1) * size, length) - block * size;
        }
      }
      read += blocks / this.numHeads;
      visible += this.numBlocks(i);
      share += tokens / this.numHeads / length;
      bytes += this.readBytes[i];
      dense += this.denseBytes[i];
    }
    const count = to - from;
    return { read: read / count, visible: visible / count, share: share / count, bytes: bytes / count, dense: dense / count };
  }

  // First and last of the blocks that every head reads whatever its scores, as [from, to) ranges.
  forced(i) {
    const current = this.numBlocks(i);
    const { num_init_blocks: init, num_local_blocks: local } = this.facts;
    const localFrom = Math.max(0, current - local);
    if (localFrom <= init) return [[0, current]];
    return init ? [[0, init], [localFrom, current]] : [[localFrom, current]];
  }

  blockIds(block) {
    const size = this.facts.block_size;
    return [...this.promptIds, ...this.ids].slice(block * size, (block + 1) * size);
  }
}
