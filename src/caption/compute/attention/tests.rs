use super::*;
use crate::caption::compute::linear::Folded;

fn numbers(count: usize, seed: u64) -> Vec<f32> {
    let mut random = fastrand::Rng::with_seed(seed);
    (0..count).map(|_| random.f32() * 2.0 - 1.0).collect()
}

/// The formula, for one query.
fn attend(query: &[f32], keys: &[&[f32]], values: &[&[f32]]) -> Vec<f32> {
    let dot = |a: &[f32], b: &[f32]| -> f64 { a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum() };
    let weights: Vec<f64> = keys.iter().map(|key| (dot(query, key) / (query.len() as f64).sqrt()).exp()).collect();
    let sum: f64 = weights.iter().sum();
    let value =
        |at: usize| weights.iter().zip(values).map(|(weight, value)| weight * f64::from(value[at])).sum::<f64>();
    (0..values[0].len()).map(|at| (value(at) / sum) as f32).collect()
}

fn assert_close(ours: &[f32], exact: &[f32], error: f32) {
    assert_eq!(ours.len(), exact.len());
    let worst = ours.iter().zip(exact).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst < error, "off by {worst}");
}

#[test]
fn tokens_attend_to_their_own_image_head_by_head() {
    // More queries than a block has, and an odd head.
    let (images, tokens, heads, head) = (2, QUERIES + 11, 3, 13);
    let width = heads * head;
    let qkv = numbers(images * tokens * 3 * width, 1);
    let ours = attend_self(Isa::detect(), &qkv, images, tokens, heads);
    let mut exact = vec![0.0; images * tokens * width];
    for (image, which) in (0..images).flat_map(|image| (0..heads).map(move |which| (image, which))) {
        let of = |part: usize| -> Vec<&[f32]> {
            let rows = qkv.chunks_exact(3 * width).skip(image * tokens).take(tokens);
            rows.map(|row| &row[part * width + which * head..][..head]).collect()
        };
        for (token, query) in of(0).into_iter().enumerate() {
            let context = attend(query, &of(1), &of(2));
            exact[(image * tokens + token) * width + which * head..][..head].copy_from_slice(&context);
        }
    }
    assert_close(&ours, &exact, 1e-5);
}

#[test]
fn folded_projections_attend_as_keys_and_values_do() {
    let (heads, head, width, tokens) = (3, 7, 20, 37);
    let hidden_width = heads * head;
    let (keys, values) = (numbers(hidden_width * width, 2), numbers(hidden_width * width, 3));
    let (bias, images) = (numbers(hidden_width, 4), [numbers(tokens * width, 5), numbers(tokens * width, 6)]);
    // More rows than threads, so that both ways to share the work are taken, and only one row.
    for rows in [1, 2 * rayon::current_num_threads()] {
        let queries = numbers(rows * hidden_width, 7);
        for (narrow, error) in [(false, 1e-5), (true, 3e-2)] {
            let packing = Packing { isa: Isa::detect(), narrow };
            let remembered = images.each_ref().map(|image| Hidden::new(image, width, packing));
            let of_rows: Vec<&Hidden> = (0..rows).map(|row| &remembered[row % 2]).collect();
            let folded = Folded::new(&keys, &values, bias.clone(), heads, packing);
            let scale = folded.scale();
            let ours = folded.contexts(&attend_hidden(&of_rows, &folded.queries(&queries), heads, scale));
            let project = |weights: &[f32], which: usize, image: &[f32]| -> Vec<Vec<f32>> {
                let weights: Vec<&[f32]> = weights.chunks_exact(width).skip(which * head).take(head).collect();
                let token = |x: &[f32]| weights.iter().map(|w| w.iter().zip(x).map(|(w, x)| w * x).sum()).collect();
                image.chunks_exact(width).map(token).collect()
            };
            let mut exact = Vec::new();
            for (row, which) in (0..rows).flat_map(|row| (0..heads).map(move |which| (row, which))) {
                let (keys, values) =
                    (project(&keys, which, &images[row % 2]), project(&values, which, &images[row % 2]));
                let keys: Vec<&[f32]> = keys.iter().map(Vec::as_slice).collect();
                let values: Vec<&[f32]> = values.iter().map(Vec::as_slice).collect();
                let query = &queries[row * hidden_width + which * head..][..head];
                let context = attend(query, &keys, &values);
                exact.extend(context.iter().zip(&bias[which * head..]).map(|(x, b)| x + b));
            }
            assert_close(&ours, &exact, error);
        }
    }
}
