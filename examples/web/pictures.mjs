// From a file that a user gives to pixels, or to a message that says why not.

const MOST_PIXELS = 1 << 26;

/** Decodes a picture upright and without colour management, as Python's runtime does. */
export async function decode(blob, name) {
  if (await isCutJpeg(blob)) throw new Error(`${name} is cut off: its end is missing. Take the whole file`);
  let bitmap;
  try {
    bitmap = await createImageBitmap(blob, {
      colorSpaceConversion: 'none', premultiplyAlpha: 'none', imageOrientation: 'from-image',
    });
  } catch {
    throw new Error(`${name} is broken or no picture that this browser can read; expected JPEG, PNG or WebP`);
  }
  if (bitmap.width * bitmap.height > MOST_PIXELS) {
    bitmap.close();
    throw new Error(`${name} has more than 67 million pixels; make it smaller first`);
  }
  return bitmap;
}

/** Whether a JPEG has no end marker behind its header: browsers show what there is, and grey for the rest. */
async function isCutJpeg(blob) {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  if (bytes[0] !== 0xff || bytes[1] !== 0xd8) return false;
  let header = 2; // a thumbnail inside has an end marker of its own
  while (header + 4 <= bytes.length && bytes[header] === 0xff && bytes[header + 1] !== 0xda)
    header += 2 + (bytes[header + 2] << 8) + bytes[header + 3];
  for (let at = bytes.length - 2; at > header; at--) if (bytes[at] === 0xff && bytes[at + 1] === 0xd9) return false;
  return true;
}
