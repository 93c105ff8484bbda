// The attention of queries over the patches of a picture, as numbers and as colour.

/** Colours of the map, from no attention to the most: [share, red, green, blue, opacity]. */
const COLOURS = [
  [0, 24, 16, 70, 0.42], [0.25, 96, 22, 122, 0.5], [0.5, 201, 58, 92, 0.6], [0.75, 246, 140, 48, 0.7], [1, 255, 238, 130, 0.8],
];

/**
 * Attention [N] of one query set, averaged over cross-attentions and heads, and over `queries` (places in the set).
 * `parts`: what the graph gave, [R, layers, heads, Q, N] each; `set`: which of all R.
 */
export function attentionOf(parts, set, queries) {
  let part = 0;
  while (set >= parts[part].dims[0]) set -= parts[part++].dims[0];
  const { data, dims: [, layers, heads, all, tokens] } = parts[part];
  const mean = new Float32Array(tokens), share = 1 / (layers * heads * queries.length);
  for (let layer = 0; layer < layers; layer++)
    for (let head = 0; head < heads; head++)
      for (const query of queries) {
        const start = (((set * layers + layer) * heads + head) * all + query) * tokens;
        for (let token = 0; token < tokens; token++) mean[token] += data[start + token] * share;
      }
  return mean;
}

/** The share of attention on what a box covers: `mask` [N] says how much of each token. */
export const shareOn = (attention, mask) => attention.reduce((sum, value, token) => sum + value * mask[token], 0);

/** Paints attention over a canvas of one pixel a patch, which CSS stretches smoothly. `most`: what is brightest. */
export function paint(canvas, attention, [rows, columns], prefix, most) {
  canvas.width = columns;
  canvas.height = rows;
  const context = canvas.getContext('2d'), image = context.createImageData(columns, rows);
  for (let patch = 0; patch < rows * columns; patch++)
    image.data.set(colour(Math.min(1, attention[prefix + patch] / most)), patch * 4);
  context.putImageData(image, 0, 0);
}

function colour(share) {
  const above = COLOURS.findIndex(([place]) => place >= share), low = COLOURS[Math.max(0, above - 1)], high = COLOURS[above];
  const between = high === low ? 0 : (share - low[0]) / (high[0] - low[0]);
  const [, red, green, blue, opacity] = low.map((value, index) => value + (high[index] - value) * between);
  return [red, green, blue, opacity * 255];
}
