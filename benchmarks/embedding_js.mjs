// The JavaScript half of embedding_js.py: {task, bundle | url, …} on stdin, milliseconds on stdout.
import { readFileSync } from 'node:fs';
import { createRequire } from 'node:module';

const request = JSON.parse(readFileSync(0, 'utf8'));

async function timed(call, repeats) {
  const times = [];
  await call();
  for (let index = 0; index < repeats; index++) {
    const start = performance.now();
    await call();
    times.push(performance.now() - start);
  }
  return times;
}

async function node({ bundle, picture, boxes, texts, threads, repeats }) {
  const { openRetriever, readImage } = await import('../examples/node/qpert.mjs');
  const retriever = await openRetriever(bundle, { intraOpNumThreads: threads });
  const image = await readImage(picture), { Tensor } = retriever;
  const raw = new Tensor('uint8', image.data, [image.height, image.width, 3]);
  const pixels = await retriever.pixels(image), tokens = await retriever.imageTokens(image);
  const none = await retriever.boxInputs([], image), some = await retriever.boxInputs(boxes, image);
  const [batch] = retriever.tokenBatches(texts, texts.length), [pairs] = retriever.tokenBatches(texts, texts.length, [1]);
  const calls = {
    preprocess: () => retriever.run('preprocess', { image: raw }),
    vision: () => retriever.run('image_tower', { pixels }),
    'image_query, no boxes': () => retriever.run('query_head', { image_tokens: tokens, ...none }),
    'image_query, boxes': () => retriever.run('query_head', { image_tokens: tokens, ...some }),
    text: () => retriever.run('text_tower', batch),
    itm: () => retriever.run('pair_scorer', { image_tokens: tokens, ...pairs }),
  };
  const result = {};
  for (const [name, call] of Object.entries(calls)) result[name] = await timed(call, repeats);
  return result;
}

async function browser({ url, chromium: path, texts, repeats }) {
  const { chromium } = createRequire(new URL('../examples/web/package.json', import.meta.url))('playwright-core');
  const opened = await chromium.launch({ executablePath: path, args: ['--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--disable-background-networking'] });
  try {
    const page = await opened.newPage();
    page.setDefaultTimeout(300_000);
    await page.route('**/page.json', async (route) => {
      const answer = await route.fetch(), values = await answer.json();
      values.pictures = [values.pictures[values.start.picture]];
      values.start.picture = 0;
      await route.fulfill({ json: values });
    });
    const start = performance.now();
    await page.goto(url);
    await page.waitForSelector('body[data-state=ready]');
    const first = performance.now() - start;
    const again = performance.now();
    await page.reload();
    await page.waitForSelector('body[data-state=ready]');
    const second = performance.now() - again;
    const stages = await page.evaluate(async ({ texts, repeats }) => {
      const { state, ask } = window.qpert, { tokens, size, own } = state.picture;
      const blob = await (await fetch(state.picture.url)).blob();
      const calls = {
        'picture to tokens (decode, preprocess, vision)': async () => {
          const bitmap = await createImageBitmap(blob, { colorSpaceConversion: 'none', premultiplyAlpha: 'none' });
          return ask('tokens', { bitmap }, [bitmap]);
        },
        'image_query, no boxes': () => ask('features', { tokens, size, boxes: [] }),
        'image_query, a set for each box': () => ask('features', { tokens, size, boxes: own }),
        text: () => ask('texts', { texts }),
      };
      const result = {};
      for (const [name, call] of Object.entries(calls)) {
        await call();
        result[name] = [];
        for (let index = 0; index < repeats; index++) {
          const begin = performance.now();
          await call();
          result[name].push(performance.now() - begin);
        }
      }
      return result;
    }, { texts, repeats });
    return { first, second, stages, version: opened.version() };
  } finally {
    await opened.close();
  }
}

console.log(JSON.stringify(await { node, browser }[request.task](request)));
