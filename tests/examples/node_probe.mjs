// What tests ask of examples/node: a JSON request on stdin, a JSON answer on stdout, arrays in files beside the request.
import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { createRequire } from 'node:module';
import { openRetriever, readImage } from '../../examples/node/qpert.mjs';
import { itcScore, Retriever } from '../../examples/node/retriever.mjs';

const request = JSON.parse(readFileSync(0, 'utf8'));
const save = (name, array) => writeFileSync(join(request.folder, name), new Uint8Array(array.buffer, array.byteOffset, array.byteLength));
const { Tokenizer } = createRequire(new URL('../../examples/node/package.json', import.meta.url))('@huggingface/tokenizers');
const tokenizerOnly = (path) => new Retriever({ tokenizer: request.spec }, {}, new Tokenizer(JSON.parse(readFileSync(path, 'utf8')), {}));
const retriever = request.tokenizer ? tokenizerOnly(request.tokenizer) : request.bundle && (await openRetriever(request.bundle));
const answer = {};

if (request.ids) answer.ids = request.ids.map((text) => retriever.tokenIds(text));
if (request.decode) {
  answer.sizes = [];
  for (const [index, path] of request.decode.entries()) {
    const { data, width, height } = await readImage(path);
    answer.sizes.push([width, height]);
    save(`decoded-${index}`, data);
  }
}
for (const [index, [file, width, height]] of (request.pixels ?? []).entries()) {
  const pixels = await retriever.pixels({ data: new Uint8Array(readFileSync(file)), width, height });
  save(`pixels-${index}`, pixels.data);
}
if (request.score) {
  const texts = await retriever.encodeTexts(request.texts);
  answer.scores = [];
  for (const { image, boxes, alpha } of request.score) {
    const features = await retriever.encodeImage(await readImage(image), boxes, alpha);
    answer.scores.push({
      itc: texts.map((text) => itcScore(features, text).score),
      matched: texts.map((text) => features.sets[Math.floor(itcScore(features, text).query / features.queries)]),
      itm: await retriever.itmScores(features, request.texts),
      queries: features.vectors.map((vector) => [...vector]),
    });
  }
}
console.log(JSON.stringify(answer));
