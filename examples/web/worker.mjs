// The model, in a thread of its own, so that the page stays quick. Messages: {id, op, ...} → {id, result} or {id, error}.
// `lib/`, `vendor/` and `bundle/` lie beside this file once build.py has put the page together.
import { check, QpertError, readManifest } from './lib/bundle.mjs';
import { Retriever } from './lib/retriever.mjs';
import { Tokenizer } from './vendor/tokenizers.mjs';

let retriever;

/** Fetches files of the page and counts the bytes of all of them as they come. */
class Downloads {
  constructor(sizes) {
    this.sizes = sizes;
    this.done = 0;
    this.total = 0;
  }

  expect(files) {
    this.total = files.reduce((sum, file) => sum + this.sizes[file], 0);
  }

  async bytes(file) {
    const response = await fetch(new URL(file, self.location.href)).catch((error) => {
      throw new QpertError(`${file} could not be loaded (${error.message}); is the connection up? Try again`);
    });
    check(response.ok, `${file} could not be loaded (the server says ${response.status}); copy the whole folder to it`);
    const parts = [], reader = response.body.getReader();
    try {
      for (let part = await reader.read(); !part.done; part = await reader.read()) {
        parts.push(part.value);
        this.done += part.value.length;
        self.postMessage({ progress: { done: Math.min(this.done, this.total), total: this.total } });
      }
    } catch (error) {
      throw new QpertError(`${file} broke off while it was loading (${error.message}); try again`);
    }
    return new Uint8Array(await new Blob(parts).arrayBuffer());
  }
}

/** A file of the bundle, with the hash that the manifest gives (browsers compute one on https and localhost alone). */
async function bundleFile(downloads, file, digest) {
  const bytes = await downloads.bytes(`bundle/${file}`);
  if (self.crypto.subtle) {
    const hash = new Uint8Array(await self.crypto.subtle.digest('SHA-256', bytes));
    const hex = [...hash].map((byte) => byte.toString(16).padStart(2, '0')).join('');
    check(hex === digest, `${file} of the bundle is damaged: its hash is not the manifest's; build the page again`);
  }
  return bytes;
}

/** ONNX Runtime in WebAssembly, with or without WebGPU: {module, glue, wasm} are its files. */
async function openRuntime(downloads, { module, glue, wasm }) {
  const ort = await import(new URL(module, self.location.href));
  ort.env.wasm.numThreads = 1; // more need headers that not every server sends
  ort.env.wasm.wasmPaths = { mjs: new URL(glue, self.location.href).href };
  ort.env.wasm.wasmBinary = (await downloads.bytes(wasm)).buffer;
  return ort;
}

const operations = {
  async load({ page, provider }) {
    check(page.providers[provider], `this page was built without ${provider}; build it with --${provider}`);
    if (provider === 'webgpu') check(await navigator.gpu?.requestAdapter(), 'this browser has no WebGPU adapter');
    const downloads = new Downloads(page.sizes);
    const manifest = readManifest(new TextDecoder().decode(await downloads.bytes('bundle/manifest.json')), 'manifest.json');
    const graphs = Object.values(manifest.graphs);
    const data = Object.keys(manifest.files).filter((file) => file.endsWith('.data'));
    downloads.expect([
      ...new Set([page.providers.wasm.wasm, page.providers[provider].wasm]), 'bundle/manifest.json', `bundle/${manifest.tokenizer.file}`,
      ...graphs.map(({ file }) => `bundle/${file}`), ...data.map((file) => `bundle/${file}`),
      ...(page.attention ? [page.attention.file] : []),
    ]);
    // Preprocessing and boxes are exact in float64 and 8 bits, which WebGPU has not, nor the program that comes with it.
    const host = await openRuntime(downloads, page.providers.wasm);
    const ort = provider === 'wasm' ? host : await openRuntime(downloads, page.providers[provider]);
    const tokenizer = new Tokenizer(
      JSON.parse(new TextDecoder().decode(await bundleFile(downloads, manifest.tokenizer.file, manifest.files[manifest.tokenizer.file]))), {},
    );
    const externalData = [];
    for (const file of data)
      externalData.push({ path: file.split('/').at(-1), data: await bundleFile(downloads, file, manifest.files[file]) });
    const sessions = {};
    for (const { role, file } of graphs) {
      let graph = await bundleFile(downloads, file, manifest.files[file]);
      if (role === 'query_head' && page.attention) {
        graph = await downloads.bytes(page.attention.file); // the same graph with one more output
        manifest.graphs.query_head.outputs.push(page.attention.output);
      }
      self.postMessage({ preparing: role });
      const isHost = role === 'preprocess' || role === 'boxes';
      sessions[role] = await (isHost ? host : ort).InferenceSession.create(graph, {
        executionProviders: [isHost ? 'wasm' : provider],
        externalData: isHost ? [] : externalData,
      });
    }
    retriever = new Retriever(manifest, sessions, tokenizer, ort.Tensor);
    const { alpha } = manifest.perturbation;
    return { alpha, takesBoxes: Boolean(sessions.boxes), patches: manifest.patches, prefix: manifest.prefix_tokens };
  },

  /** A decoded picture → its image tokens, which the page keeps and sends back with boxes. */
  async tokens({ bitmap }) {
    const { width, height } = bitmap;
    const context = new OffscreenCanvas(width, height).getContext('2d', { willReadFrequently: true });
    context.drawImage(bitmap, 0, 0);
    bitmap.close();
    const { data } = context.getImageData(0, 0, width, height), rgb = new Uint8Array(width * height * 3);
    for (let from = 0, to = 0; from < data.length; from += 4, to += 3) rgb.set(data.subarray(from, from + 3), to);
    const { type, data: values, dims } = await retriever.imageTokens({ data: rgb, width, height });
    return { type, data: values, dims };
  },

  /** Image tokens and boxes → query vectors of all sets, and their attention. */
  async features({ tokens, boxes, size, alpha }) {
    const image = new retriever.Tensor(tokens.type, tokens.data, tokens.dims);
    const { sets, vectors, queries, parts, slots } = await retriever.imageFeatures(image, boxes, size, alpha);
    const attention = parts.filter((part) => part.attention).map((part) => part.attention);
    return {
      sets, queries, vectors,
      masks: slots.object_masks && { data: slots.object_masks.data, dims: slots.object_masks.dims },
      attention: attention.map(({ data, dims }) => ({ data, dims })),
    };
  },

  texts: ({ texts }) => retriever.encodeTexts(texts),

  /** Match logits of a picture with texts; the page does not show them, tests compare them. */
  async itm({ tokens, boxes, size, texts }) {
    const image = new retriever.Tensor(tokens.type, tokens.data, tokens.dims);
    return retriever.itmScores(await retriever.imageFeatures(image, boxes, size), texts);
  },
};

let queue = Promise.resolve();
self.onmessage = ({ data: { id, op, ...request } }) => {
  queue = queue.then(async () => {
    try {
      self.postMessage({ id, result: await operations[op](request) });
    } catch (error) {
      const known = error instanceof QpertError;
      if (!known) console.error(error);
      self.postMessage({ id, error: known ? error.message : `something went wrong: ${error.message}` });
    }
  });
};
