// Pictures, boxes and texts to scores, with the graphs of one bundle. Runs in Node and in browsers.
import { check, checkBoxes } from './bundle.mjs';

export const NO_BOX = -1; // in place of a box's number: a query set that is stock, or perturbed by all boxes together
const LONGEST_TEXT = 10_000; // characters, as in `qpert serve`
const WORD = /[^\t-\r\x1c- \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]/; // not what Python calls a space

export class Retriever {
  /**
   * manifest: from `readManifest`. sessions: ONNX Runtime's, by role. tokenizer: of @huggingface/tokenizers.
   * Tensor: the class of the ONNX Runtime that made the sessions.
   */
  constructor(manifest, sessions, tokenizer, Tensor) {
    Object.assign(this, { manifest, sessions, tokenizer, Tensor });
  }

  floats = (data, dims) => new this.Tensor('float32', data, dims);

  /** Runs a graph; its inputs and outputs go by slot, whatever a family calls its tensors. */
  async run(role, slots) {
    const { inputs, outputs } = this.manifest.graphs[role];
    const feeds = Object.fromEntries(inputs.map(({ name, slot }) => [name, slots[slot]]));
    const results = await this.sessions[role].run(feeds);
    return Object.fromEntries(outputs.map(({ name, slot }) => [slot, results[name]]));
  }

  /** {data: Uint8Array RGB, width, height}, upright → `pixel_values` [1, 3, S, S]. */
  async pixels({ data, width, height }) {
    return (await this.run('preprocess', { image: new this.Tensor('uint8', data, [height, width, 3]) })).pixels;
  }

  /** A picture → image tokens [1, N, C]. They do not depend on boxes. */
  async imageTokens(image) {
    return (await this.run('image_tower', { pixels: await this.pixels(image) })).image_tokens;
  }

  /** Boxes → `object_masks` [1, O, N] and `box_weights` [1, O]; `alpha` replaces the bundle's α. */
  async boxInputs(boxes, { width, height }, alpha) {
    const kept = checkBoxes(boxes, { width, height }, this.manifest.graphs.query_head.ranges.O.max);
    const corners = this.floats(Float32Array.from(kept.flat()), [1, kept.length, 4]);
    const slots = await this.run('boxes', { boxes: corners, image_size: this.floats([width, height], [1, 2]) });
    const exported = this.manifest.perturbation.alpha, { data, dims } = slots.box_weights;
    if (alpha === undefined) return slots;
    check(exported, 'this bundle has alpha 0, so its weights cannot be scaled; export it with another');
    return { ...slots, box_weights: this.floats(data.map((weight) => (weight / exported) * alpha), dims) };
  }

  /** Image tokens and boxes → features: the queries of one set, or with reduction `each` of a set for each box. */
  async imageFeatures(tokens, boxes, size, alpha) {
    check(this.sessions.boxes || !boxes.length, 'this bundle takes no boxes; export it with --perturb itc');
    const slots = this.sessions.boxes ? await this.boxInputs(boxes, size, alpha) : {};
    const { reduction, keep_stock } = this.manifest.perturbation, parts = [];
    const count = reduction === 'each' ? slots.box_weights?.dims[1] : 0;
    const sets = count ? [...(keep_stock ? [NO_BOX] : []), ...Array(count).keys()] : [NO_BOX];
    if (!count) parts.push(await this.run('query_head', { image_tokens: tokens, ...slots }));
    else for (const some of chunks(sets, this.manifest.graphs.query_head.ranges.B.max))
      parts.push(await this.encodeSets(tokens, slots, some));
    const vectors = parts.flatMap(({ image_vectors: { data, dims } }) => rowsOf(data, dims[2]));
    return { tokens, slots, sets, vectors, queries: vectors.length / sets.length, parts };
  }

  /** Query sets of single boxes; the stock set's masks and weights stay 0. */
  encodeSets(tokens, { object_masks: { data, dims }, box_weights }, sets) {
    const width = dims[2], masks = new Float32Array(sets.length * width), weights = new Float32Array(sets.length);
    sets.forEach((box, row) => {
      if (box === NO_BOX) return;
      masks.set(data.subarray(box * width, (box + 1) * width), row * width);
      weights[row] = box_weights.data[box];
    });
    const { shared } = this.manifest.graphs.query_head.inputs.find(({ slot }) => slot === 'image_tokens');
    return this.run('query_head', {
      image_tokens: shared ? tokens : this.repeated(tokens, sets.length),
      object_masks: this.floats(masks, [sets.length, 1, width]),
      box_weights: this.floats(weights, [sets.length, 1]),
    });
  }

  repeated({ type, data, dims }, rows) {
    const all = new data.constructor(data.length * rows);
    for (let row = 0; row < rows; row++) all.set(data, row * data.length);
    return new this.Tensor(type, all, [rows, ...dims.slice(1)]);
  }

  async encodeImage(image, boxes = [], alpha = undefined) {
    return this.imageFeatures(await this.imageTokens(image), boxes, image, alpha);
  }

  /** Token ids of a text: tokenizer.json cleans and frames; it is cut here, as the library ignores `truncation`. */
  tokenIds(text, name = 'the text') {
    check(WORD.test(text), `${name} is blank; expected at least one word`);
    check(text.isWellFormed(), `${name} holds lone surrogates; expected text that was decoded from UTF-8`);
    check(text.length <= LONGEST_TEXT, `${name} has ${text.length} characters; expected at most ${LONGEST_TEXT}`);
    const ids = this.tokenizer.encode(text).ids.map(Number), most = this.manifest.tokenizer.max_length;
    const ends = ids.length > most && Number(this.tokenizer.encode('').ids.at(-1)) === ids.at(-1); // with an end token
    return ends ? [...ids.slice(0, most - 1), ids.at(-1)] : ids.slice(0, most);
  }

  /** Texts in calls of at most `most`: int64 token ids and mask [T, L], behind `lead`ing axes. */
  tokenBatches(texts, most, lead = []) {
    const { max_length, pad, pad_id, pad_side } = this.manifest.tokenizer;
    return chunks(texts.map((text, index) => this.tokenIds(text, `text ${index}`)), most).map((rows) => {
      const length = pad === 'max_length' ? max_length : Math.max(...rows.map((row) => row.length));
      const ids = new BigInt64Array(rows.length * length).fill(BigInt(pad_id)), mask = new BigInt64Array(ids.length);
      rows.forEach((row, index) => {
        const start = index * length + (pad_side === 'right' ? 0 : length - row.length);
        ids.set(row.map(BigInt), start);
        mask.fill(1n, start, start + row.length);
      });
      const tensor = (data) => new this.Tensor('int64', data, [...lead, rows.length, length]);
      return { token_ids: tensor(ids), token_mask: tensor(mask) };
    });
  }

  /** T texts → T vectors of unit length. */
  async encodeTexts(texts) {
    const vectors = [];
    for (const tokens of this.tokenBatches(texts, this.manifest.graphs.text_tower.ranges.T.max)) {
      const { data, dims } = (await this.run('text_tower', tokens)).text_vectors;
      vectors.push(...rowsOf(data, dims[1]));
    }
    return vectors;
  }

  /** Match logits of a picture's features with T texts. */
  async itmScores({ tokens, slots }, texts) {
    const scorer = this.manifest.graphs.pair_scorer, scores = [];
    check(scorer, 'this bundle has no pair scorer; rank by the first score alone');
    for (const batch of this.tokenBatches(texts, scorer.ranges.T.max, [1]))
      scores.push(...(await this.run('pair_scorer', { ...slots, image_tokens: tokens, ...batch })).pair_scores.data);
    return scores;
  }
}

const count = (length) => Array.from({ length }, (_, index) => index);
const chunks = (all, most) => count(Math.ceil(all.length / most)).map((i) => all.slice(i * most, (i + 1) * most));
const rowsOf = (data, width) => count(data.length / width).map((i) => data.subarray(i * width, (i + 1) * width));

/** Contrastive score of a picture's features with a text vector, and which of the vectors gave it. */
export function itcScore({ vectors }, text) {
  const products = vectors.map((vector) => vector.reduce((sum, value, i) => sum + value * text[i], 0));
  const score = Math.max(...products);
  return { score, query: products.indexOf(score) };
}

/** Indices from the highest score to the lowest; ties go to the lower index. */
export const ranking = (scores) => scores.map((_, index) => index).sort((a, b) => scores[b] - scores[a] || a - b);
