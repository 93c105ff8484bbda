// A bundle's manifest, and the errors that a user of a bundle can meet. Runs in Node and in browsers.

/** What went wrong in one line: what was got, what was expected, what to do. Anything else that is thrown is a bug. */
export class QpertError extends Error {}

export function check(condition, message) {
  if (!condition) throw new QpertError(message);
}

/** The manifest in `text`, with `graphs` by role; `name` is what errors call it. */
export function readManifest(text, name) {
  try {
    const manifest = JSON.parse(text), version = manifest.schema_version;
    check(version <= 2, `the bundle has schema version ${version}, this program reads up to 2; update it`);
    const graphs = Object.fromEntries(Object.values(manifest.graphs).map((graph) => [graph.role, graph]));
    for (const role of ['image_tower', 'query_head', 'text_tower', 'preprocess'])
      check(graphs[role], `${name} describes no graph of role ${role}; export the bundle again with a newer qpert`);
    const used = [manifest.tokenizer.file, ...Object.values(graphs).map((graph) => graph.file)];
    for (const file of [...used, ...Object.keys(manifest.files)]) {
      const outside = !file || /^\/|[\\:]/.test(file) || file.split('/').includes('..');
      check(!outside, `the manifest names "${file}", which is outside the bundle; do not trust this bundle`);
      check(manifest.files[file], `${name} gives no hash for ${file}; do not trust this bundle, export it again`);
    }
    const { first } = manifest.scores;
    check(first === 'max_cosine', `the first score is ${first}, this program knows max_cosine; update it`);
    return { ...manifest, graphs };
  } catch (error) {
    if (error instanceof QpertError) throw error;
    throw new QpertError(`${name} is no manifest of qpert (${error.message}); export the bundle again`);
  }
}

/** Boxes [[x1, y1, x2, y2], …] in pixels of a picture; those that miss it by less than a pixel are left out. */
export function checkBoxes(boxes, { width, height }, most) {
  const kept = boxes.filter((box, index) => {
    const [x1, y1, x2, y2] = box, name = `box ${index} (${box.join(', ')})`;
    check(box.length === 4 && box.every(Number.isFinite), `${name} is not finite; expected x1, y1, x2, y2 in pixels`);
    check(x1 < x2 && y1 < y2, `${name} is empty or inverted; expected x1 < x2 and y1 < y2`);
    const gap = Math.max(-x2, -y2, x1 - width, y1 - height);
    check(gap < 1, `${name} lies outside the picture of ${width}×${height} pixels; expected pixels of it, upright`);
    return gap < 0;
  });
  check(kept.length <= most, `a picture has ${kept.length} boxes, this bundle takes up to ${most}; keep the best ones`);
  return kept;
}
