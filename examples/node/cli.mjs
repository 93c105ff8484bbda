#!/usr/bin/env node
import { basename } from 'node:path';
import { parseArgs } from 'node:util';
import { check, QpertError } from './bundle.mjs';
import { openRetriever, readImage, readText } from './qpert.mjs';
import { itcScore, ranking } from './retriever.mjs';

const USAGE = `usage:
node cli.mjs BUNDLE --image FILE … --text SENTENCE … [--boxes FILE.jsonl] [--alpha A] [--itm] [--json]
Ranks the sentences for each picture. Boxes: one object a line with image, x1, y1, x2, y2 in pixels.`;

/** Boxes by the name of their picture. */
async function readBoxes(path) {
  const boxes = new Map(), lines = path ? (await readText(path)).split('\n') : [];
  for (const [index, line] of lines.entries()) {
    try {
      if (!line.trim()) continue;
      const { image, x1, y1, x2, y2 } = JSON.parse(line.replace(/:\s*(NaN|-?Infinity)\b/g, ':"$1"'));
      boxes.set(image, [...(boxes.get(image) ?? []), [x1, y1, x2, y2]]);
    } catch (error) {
      throw new QpertError(`${path}:${index + 1} is not JSON (${error.message}); expected image, x1, y1, x2, y2`);
    }
  }
  return boxes;
}

async function main() {
  const many = { type: 'string', multiple: true, default: [] }, one = { type: 'string' }, flag = { type: 'boolean' };
  const options = { image: many, text: many, boxes: one, alpha: one, itm: flag, json: flag };
  const { values, positionals: [folder] } = parseArgs({ options, allowPositionals: true });
  check(folder && values.image.length && values.text.length, `expected a bundle, a picture and a sentence\n${USAGE}`);
  const boxes = await readBoxes(values.boxes), alpha = values.alpha && Number(values.alpha), report = [];
  check(!values.alpha || Number.isFinite(alpha), `--alpha is ${values.alpha}; expected a finite number`);
  const retriever = await openRetriever(folder), texts = await retriever.encodeTexts(values.text);
  for (const image of values.image) {
    const own = boxes.get(basename(image)) ?? [];
    const features = await retriever.encodeImage(await readImage(image), own, alpha);
    const itc = texts.map((text) => itcScore(features, text).score);
    const itm = values.itm ? await retriever.itmScores(features, values.text) : itc.map(() => null);
    const hits = itc.map((first, i) => ({ text: values.text[i], score: first + itm[i], itc: first, itm: itm[i] }));
    report.push({ image, boxes: own.length, hits: ranking(hits.map((hit) => hit.score)).map((i) => hits[i]) });
  }
  if (values.json) return console.log(JSON.stringify({ images: report }));
  for (const { image, boxes: number, hits } of report) {
    console.log(`${image} (boxes: ${number})`);
    for (const { score, text } of hits) console.log(`  ${score.toFixed(4).padStart(8)}  ${text}`);
  }
}

main().catch((error) => {
  if (!(error instanceof QpertError) && !error.code?.startsWith('ERR_PARSE_ARGS')) throw error;
  console.error(`error: ${error.message}`);
  process.exitCode = 2;
});
