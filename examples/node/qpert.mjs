// What of a retriever is Node's own: a bundle in a folder, and pictures in files.
import { createHash } from 'node:crypto';
import { createReadStream } from 'node:fs';
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { pipeline } from 'node:stream/promises';
import { Tokenizer } from '@huggingface/tokenizers';
import * as ort from 'onnxruntime-node';
import sharp from 'sharp';
import { check, QpertError, readManifest } from './bundle.mjs';
import { Retriever } from './retriever.mjs';

const LARGEST = 178_956_970; // pixels; more is a decompression bomb to Pillow

/** Opens a bundle after checking every file's SHA-256. `options`: of `InferenceSession.create`, such as threads. */
export async function openRetriever(folder, options = {}) {
  const path = join(folder, 'manifest.json'), manifest = readManifest(await readText(path), path), sessions = {};
  for (const [file, digest] of Object.entries(manifest.files)) {
    const found = file.startsWith('reports/') ? digest : await hashOf(join(folder, file));
    check(found === digest, `the bundle's file ${file} is not the one that was exported; copy the bundle again`);
  }
  const tokenizer = new Tokenizer(JSON.parse(await readText(join(folder, manifest.tokenizer.file))), {});
  for (const [role, { file }] of Object.entries(manifest.graphs))
    sessions[role] = await ort.InferenceSession.create(join(folder, file), options);
  return new Retriever(manifest, sessions, tokenizer, ort.Tensor);
}

const unreadable = (path) => (error) => {
  throw new QpertError(`cannot read ${path} (${error.code}); expected a file there, check the path`);
};
export const readText = (path) => readFile(path, 'utf8').catch(unreadable(path));

async function hashOf(path) {
  const hash = createHash('sha256');
  await pipeline(createReadStream(path), hash).catch(unreadable(path));
  return hash.digest('hex');
}

/** A picture file → {data: Uint8Array RGB, width, height}: upright, colour profiles ignored, as Python reads it. */
export async function readImage(path) {
  try {
    const image = sharp(path, { ignoreIcc: true, failOn: 'truncated', limitInputPixels: LARGEST });
    const { depth, space } = await image.metadata();
    check(depth === 'uchar' && space !== 'cmyk', `${path} is ${depth} ${space}; expected 8-bit grey or RGB: convert it`);
    const { data, info } = await image.rotate().removeAlpha().toColourspace('srgb').raw()
      .toBuffer({ resolveWithObject: true });
    return { data: new Uint8Array(data), width: info.width, height: info.height };
  } catch (error) {
    if (error instanceof QpertError) throw error;
    throw new QpertError(`${path} is no whole picture (${error.message.split('\n')[0]}); replace it or leave it out`);
  }
}
